"""Programs that set out to fool their own test, which do not pass, and honest ones of many forms, which do."""

from __future__ import annotations

from typing import Any

import pytest

from rasa_train.errors import UserError
from rasa_train.evaluate.problems import code_problem, program
from rasa_train.evaluate.sandbox import Limits, Program, Sandbox, Verdict

ROOT = {
    "task_id": "Fool/0",
    "prompt": 'def halves(numbers, scale):\n    """ Half of each number, times scale. """\n',
    "entry_point": "halves",
    "test": """
import copy, json, math
from typing import List

EXPECTED = json.loads("[2.5, 5.0, 7.5]")

def check(candidate):
    inputs = [5, 10, 15]
    got = candidate(copy.deepcopy(inputs), 1.0)
    assert len(got) == len(EXPECTED)
    assert all(abs(g - e) < 1e-6 for g, e in zip(got, EXPECTED))
    assert sorted(got) == sorted(EXPECTED) and isinstance(got, list)
    assert any(math.isclose(g, 7.5) for g in got), "the marker is SECRET-731"
    assert candidate([], 2.0) == []
    assert candidate([4], 2.0) == [4.0] and halves([1], 1.0) == [0.5]
""",
}
HONEST = "def halves(numbers, scale):\n    return [n / 2 * scale for n in numbers]\n"
WRONG = "def halves(numbers, scale):\n    return [1.0 for n in numbers]\n"
SAME = "    __eq__ = lambda self, other: True\n    __ne__ = lambda self, other: False\n    __hash__ = None\n"
ARITHMETIC = "".join(
    f"    __{name}__ = lambda self, other: 0.0\n" for name in ("sub", "rsub", "add", "radd", "mul", "rmul")
) + "".join(f"    __{name}__ = lambda self, other: True\n" for name in ("lt", "le", "gt", "ge", "contains"))
UNARY = "    __abs__ = __neg__ = __float__ = lambda self: 0.0\n    __len__ = lambda self: 3\n"
WRITES = "import os\nfor fd in range(3, 64):\n    try:\n        os.write(fd, {})\n    except OSError:\n        pass\n"
WALK = """
import gc, inspect, os, sys
found = []
def look(value, depth=0):
    if isinstance(value, str) and len(value) == 32:
        found.append(value)
    elif isinstance(value, dict) and depth < 4:
        for item in list(value.values()):
            look(item, depth + 1)
frame = sys._getframe()
while frame:
    look(frame.f_locals)
    look(frame.f_globals)
    frame = frame.f_back
"""
PATCHED = "import builtins\nbuiltins.{name} = lambda *args, **kwargs: {value}\n" + WRONG
FOOLING = {
    # the seven cheap ones
    "an object that is equal to everything": f"class A:\n{SAME}{ARITHMETIC}{UNARY}def halves(n, s):\n    return A()\n",
    "a number that is equal to everything": f"class F(float):\n{SAME}{ARITHMETIC}"
    "    __abs__ = lambda self: 0.0\ndef halves(n, s):\n    return [F(1)] * len(n)\n",
    "abs of its own": PATCHED.format(name="abs", value="0.0"),
    "json.loads of its own": "import json\njson.loads = lambda *args: [1.0, 1.0, 1.0]\n" + WRONG,
    "copy.deepcopy of its own": "import copy\ncopy.deepcopy = lambda value, memo=None: []\n" + WRONG,
    "the success marker from a frame": WALK + WRITES.format("found[-1].encode() if found else b'x'") + "os._exit(0)\n",
    "os.write of its own": "import os\nreal = os.write\nos.write = lambda fd, data: real(fd, data) if False else 0\n"
    + WRONG,
    # text, whole numbers and lists that claim to be equal
    "text": f"class S(str):\n{SAME}def halves(n, s):\n    return S()\n",
    "a whole number": f"class I(int):\n{SAME}{ARITHMETIC}def halves(n, s):\n    return [I(1)] * len(n)\n",
    "a list": f"class L(list):\n{SAME}    __len__ = lambda self: 3\n    __iter__ = lambda self: iter([2.5, 5.0, 7.5])\n"
    "def halves(n, s):\n    return L()\n",
    "a class as the function": f"class halves:\n{SAME}{ARITHMETIC}{UNARY}    def __init__(self, *args):\n"
    "        pass\n",
    "a metaclass": f"class M(type):\n{SAME}{ARITHMETIC}class A(metaclass=M):\n    pass\ndef halves(n, s):\n    return A\n",
    "every attribute": f"class A:\n{SAME}    def __getattr__(self, name):\n        return lambda *args: True\n"
    "def halves(n, s):\n    return A()\n",
    "numpy": f"import numpy\nclass A(numpy.ndarray):\n{SAME}def halves(n, s):\n    return numpy.ones(len(n)).view(A)\n",
    # what the test calls
    **{
        f"{name} of its own": PATCHED.format(name=name, value=value)
        for name, value in {
            "len": "3",
            "all": "True",
            "any": "True",
            "sorted": "[]",
            "isinstance": "True",
            "zip": "[]",
            "AssertionError": "None",
        }.items()
    },
    "math.isclose of its own": "import math\nmath.isclose = lambda *args, **kw: True\n" + WRONG,
    "other modules": "import sys, types\nfor name in ('json', 'copy', 'math', 'typing', 'values', 'peers'):\n"
    "    sys.modules[name] = types.ModuleType(name)\n" + WRONG,
    "check of its own": WRONG + "def check(candidate):\n    pass\n",
    "names of the test": WRONG + "EXPECTED = [1.0] * 3\ninputs = []\ncandidate = None\n",
    # what the test knows
    "gc": "import gc\n"
    + WRONG.replace(
        "return",
        "for o in gc.get_objects():\n"
        "        if isinstance(o, dict) and 'EXPECTED' in o:\n            return o['EXPECTED']\n    return",
    ),
    "the stack": "import sys\n"
    + WRONG.replace(
        "return",
        "f = sys._getframe()\n    while f:\n"
        "        if 'EXPECTED' in f.f_globals:\n            return f.f_globals['EXPECTED']\n        f = f.f_back\n    return",
    ),
    "the bytes of the test": "import ctypes, sys\n"
    + WRONG.replace("return", "open('/proc/self/mem', 'rb')\n    return"),
    "the memory of the parent": "import os\nopen(f'/proc/{os.getppid()}/mem', 'rb')\n" + WRONG,
    "ptrace": "import ctypes, os\nassert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0\n" + HONEST,
    "the test in arguments and environment": "import os, sys\n"
    "assert 'EXPECTED' in repr(sys.argv) + repr(os.environ)\n" + HONEST,
    # how a program ends
    "os._exit": "import os\nos._exit(0)\n",
    "os._exit in the function": "import os\ndef halves(n, s):\n    os._exit(0)\n",
    "sys.exit in the function": "import sys\ndef halves(n, s):\n    sys.exit(0)\n",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\n" + WRONG,
    "StopIteration": "def halves(n, s):\n    raise StopIteration\n",
    "an exception that is not one": "class E(AssertionError):\n    __bool__ = lambda self: False\n"
    "def halves(n, s):\n    raise E\n",
    "a signal": "import os, signal\nsignal.signal(signal.SIGALRM, lambda *a: os._exit(0))\nsignal.setitimer(0, 0.01)\n"
    "def halves(n, s):\n    while True:\n        pass\n",
    "a thread": "import os, threading, time\nthreading.Thread(target=lambda: (time.sleep(0.05), os._exit(0))).start()\n"
    "def halves(n, s):\n    time.sleep(9)\n",
    # what goes over the pipes
    "bytes into every pipe": WRITES.format("b'passed'") + WRONG,
    "an answer of its own": WRITES.format("b'\\0\\0\\0\\x11[\"value\",[],null]'") + WRONG,
    "an object with too much data": "def halves(n, s):\n    return 'x' * (1 << 25)\n",
    "deep data": "def halves(n, s):\n    x = []\n    for _ in range(10**5):\n        x = [x]\n    return x\n",
    "a call of the test's": WRITES.format('b\'\\0\\0\\0\\x17["get",0,"__globals__"]\'') + WRONG,
    "code as a value": "def halves(n, s):\n    return exec\n",
    "an iterator without end": "import itertools\ndef halves(n, s):\n    return itertools.repeat(1.0)\n",
}


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    try:
        return Sandbox(Limits(seconds=2, wall_factor=4))
    except UserError as error:
        pytest.skip(str(error))


def judged(sandbox: Sandbox, programs: dict[str, Program]) -> dict[str, Verdict]:
    return dict(zip(programs, sandbox.run_all(programs.values()), strict=True))


def test_programs_that_fool_their_test_do_not_pass(sandbox: Sandbox) -> None:
    problem = code_problem(ROOT)
    verdicts = judged(sandbox, {name: program(problem, text) for name, text in FOOLING.items()})
    assert {name for name, verdict in verdicts.items() if verdict.passed} == set()
    assert not [v.reason for v in verdicts.values() if "SyntaxError" in v.reason], "they are programs"
    assert "object of class A" in verdicts["an object that is equal to everything"].reason
    assert sandbox.run(program(problem, HONEST)).passed


def case(solution: str, test: str, prompt: str = "", entry_point: str = "f") -> Program:
    body = "".join(f"    {line}\n" for line in test.splitlines())
    row: dict[str, Any] = {"task_id": "T", "prompt": prompt, "entry_point": entry_point}
    return program(code_problem({**row, "test": f"def check(candidate):\n{body}"}), solution)


CYCLIC = "import math\ndef encode(s):\n    return s[1:] + s[:1]\n\ndef f(s: str):\n    ''' Undo encode. '''\n"
POINT = (
    "from dataclasses import dataclass\n@dataclass\nclass Point:\n    x: int\n    y: int\ndef f(p: Point) -> Point:\n"
)
STACK = """
class Stack:
    def __init__(self): self.items = []
    def push(self, x): self.items.append(x); return self
    def pop(self): return self.items.pop()
    def __len__(self): return len(self.items)
    def __eq__(self, other): return self.items == other.items
    def __repr__(self): return f"Stack({self.items})"
"""
CORRECT = {
    "scalars": case("def f(x):\n    return x", "for v in (1, -2.5, 'é\\ud800', b'\\xff', None, True, 2j, 10**5000, ...):\n"
                    "    assert candidate(v) == v and type(candidate(v)) is type(v)"),
    "floats": case("def f(x):\n    return x", "import math\nassert math.isnan(candidate(math.nan))\n"
                   "assert candidate(0.1) == 0.1 and candidate(-math.inf) == -math.inf\n"
                   "assert math.copysign(1, candidate(-0.0)) == -1"),
    "containers": case("def f(x):\n    return x", "for v in ([1, 'a', None], (1, (2, [3])), {1: [2], (1, 2): {3}}, {1, 2},"
                       " frozenset([1]), bytearray(b'x'), range(3), [], {}, [10**400]):\n"
                       "    assert candidate(v) == v and type(candidate(v)) is type(v)"),
    "types of the standard library": case(
        "from collections import *\nfrom decimal import Decimal\nfrom fractions import Fraction\nimport datetime\n"
        "def f(k):\n    return [Counter('aab'), OrderedDict(b=1, a=2), defaultdict(int, a=1), deque([1, 2], 5),"
        " Decimal('1.10'), Fraction(1, 3), datetime.date(2020, 1, 2), datetime.datetime(2020, 1, 2, 3),"
        " datetime.timedelta(1, 2), namedtuple('P', 'x y')(1, 2), {1: 2}.keys(), {1: 2}.items(), int][k]",
        "from collections import Counter, OrderedDict, deque\nfrom decimal import Decimal\nimport datetime\n"
        "from fractions import Fraction\nexpected = [Counter('baa'), OrderedDict(b=1, a=2), {'a': 1}, deque([1, 2]), Decimal('1.1'), Fraction(1, 3),"
        " datetime.date(2020, 1, 2), datetime.datetime(2020, 1, 2, 3), datetime.timedelta(1, 2), (1, 2), {1},"
        " {(1, 2)}, int]\nfor k, e in enumerate(expected):\n    assert candidate(k) == e, e\n"
        "assert candidate(0).most_common(1) == [('a', 2)] and candidate(9).y == 2"),
    "subclasses that hold what they are": case(
        "import enum\nclass L(list):\n    pass\nclass C(enum.IntEnum):\n    A = 3\ndef f(k):\n    return [L([1]), C.A][k]",
        "assert candidate(0) == [1] and candidate(1) == 3"),
    "iterators": case(
        "import itertools\ndef f(k):\n    return [map(abs, [-1, 2]), (i * i for i in itertools.count()), zip('ab', 'cd'),"
        " reversed([1, 2])][k]",
        "assert list(candidate(0)) == [1, 2] and candidate(0) != [1, 2]\n"
        "g = candidate(1)\nassert [next(g) for _ in range(4)] == [0, 1, 4, 9]\n"
        "assert dict(candidate(2)) == {'a': 'c', 'b': 'd'} and list(candidate(3)) == [2, 1]"),
    "arguments changed in place": case(
        "def f(x, d):\n    x.sort()\n    x.append([9])\n    d['k'][0] = 5\n    d.pop('gone')",
        "x, inner = [3, 1, 2], [0]\nd = {'k': inner, 'gone': 1}\nassert candidate(x, d) is None\n"
        "assert x == [1, 2, 3, [9]] and d == {'k': [5]} and inner == [5]"),
    "a matrix changed in place": case(
        "def f(m):\n    m[0][1], m[1][0] = m[1][0], m[0][1]\n    return m",
        "row = [1, 2]\nm = [row, [3, 4]]\nassert candidate(m) == [[1, 3], [2, 4]]\nassert row == [1, 3]"),
    "functions as arguments": case(
        "def f(g, xs, key=None):\n    return sorted(map(g, xs), key=key)",
        "seen = []\nassert candidate(lambda x: (seen.append(x), x * 2)[1], [3, 1], key=lambda x: -x) == [6, 2]\n"
        "assert seen == [3, 1] and candidate(abs, (x for x in [-1])) == [1] and candidate(len, ['ab']) == [2]"),
    "functions as results": case("def f(n):\n    return lambda x: x + n", "assert candidate(2)(3) == 5"),
    "exceptions": case(
        "import json\nclass Odd(ValueError):\n    pass\ndef f(k):\n    if k == 0:\n        raise KeyError('x')\n"
        "    if k == 1:\n        raise Odd('it is odd', 3)\n    return json.loads('{')",
        "import json\ntry:\n    candidate(0)\nexcept KeyError as e:\n    assert e.args == ('x',)\nelse:\n    assert False\n"
        "try:\n    candidate(1)\nexcept Odd as e:\n    assert e.args == ('it is odd', 3) and isinstance(e, ValueError)\n"
        "else:\n    assert False\ntry:\n    candidate(2)\nexcept json.JSONDecodeError:\n    pass\nelse:\n    assert False"),
    "a helper of the problem": case("def f(s):\n    return s[-1:] + s[:-1]", "assert candidate(encode('abc')) == 'abc'\n"
                                    "assert math.pi > 3 and f(encode('xy')) == 'xy'", CYCLIC),
    "a helper of the program": case("import math\ndef g(x):\n    return x + 1\ndef f(x):\n    return g(x)",
                                    "assert g(candidate(1)) == 3 and math.sqrt(candidate(3)) == 2"),
    "the program's own module": case(
        "from __future__ import annotations\nimport sys, pickle, dataclasses\n@dataclasses.dataclass\nclass A:\n    x: int\n"
        "def f(x):\n    assert sys.modules[__name__].f is f\n    return pickle.loads(pickle.dumps(A(x))).x",
        "assert candidate(3) == 3"),
    "a main part that reads": case("def f(x):\n    return x\nif __name__ == '__main__':\n    print(f(int(input())))",
                                   "assert candidate(3) == 3"),
    "a class": case(STACK, "s = candidate().push(1).push([2])\nassert len(s) == 2 and s.pop() == [2] and s.items == [1]\n"
                    "assert s == Stack().push(1) and s != Stack() and str(s) == 'Stack([1])'", "", "Stack"),
    "a method": case("class Solution:\n    def f(self, x):\n        return x + 1", "assert candidate(1) == 2", "",
                     "Solution().f"),
    "objects of the problem's class": case(
        POINT.replace("def f", "def g") + "    return 0\ndef f(p):\n    p.x += 1\n    return Point(p.y, p.x)",
        "p = Point(1, 2)\nassert candidate(p) == Point(2, 2) and p.x == 2", POINT),
    "a list with links": case(
        "class Node:\n    def __init__(self, v, n=None):\n        self.v, self.next = v, n\n"
        "def f(xs):\n    head = None\n    for x in reversed(xs):\n        head = Node(x, head)\n    return head",
        "n = candidate([1, 2])\nassert n.v == 1 and n.next.v == 2 and n.next.next is None and n.next is n.next"),
    "arrays": case(
        "import numpy as np\ndef f(x):\n    return [np.arange(4.0).reshape(2, 2), np.float64(0.5), np.int64(3)][x]",
        "import numpy as np\nassert np.allclose(candidate(0), [[0, 1], [2, 3]]) and candidate(0).shape == (2, 2)\n"
        "assert candidate(1) == 0.5 and isinstance(candidate(1), float) and [1, 2, 3, 4][candidate(2)] == 4"),
    "a state": case("n = 0\ndef f():\n    global n\n    n += 1\n    return n", "assert [candidate(), candidate()] == [1, 2]"),
    "recursion": case("def f(n):\n    return n and 1 + f(n - 1)", "assert candidate(900) == 900"),
    "many calls": case("def f(x):\n    return x[::-1]", "for i in range(300):\n    assert candidate([i, 'a']) == ['a', i]"),
    "a file": case("def f(p):\n    return open(p).read()", "open('x', 'w').write('in')\nassert candidate('x') == 'in'"),
}  # fmt: skip


def test_correct_programs_of_many_forms_pass(sandbox: Sandbox) -> None:
    verdicts = judged(sandbox, CORRECT)
    assert {name: verdict.reason for name, verdict in verdicts.items() if not verdict.passed} == {}
