"""Programs that set out to fool their own test, which do not pass, and honest ones of many forms, which do."""

from __future__ import annotations

from typing import Any

import pytest

from rasa_train.errors import UserError
from rasa_train.evaluate.problems import code_problem, program
from rasa_train.evaluate.sandbox import Limits, Program, Sandbox, Verdict


def case(solution: str, test: str, prompt: str = "", entry_point: str = "f", before: str = "") -> Program:
    """Return a program with the test whose ``check`` has the given lines, after the lines ``before``."""
    body = "".join(f"    {line}\n" for line in test.splitlines())
    row: dict[str, Any] = {"task_id": "T", "prompt": prompt, "entry_point": entry_point}
    return program(code_problem({**row, "test": f"{before}\ndef check(candidate):\n{body}"}), solution)


PROMPT = 'def f(x):\n    """ Half of x. """\n'
EQUAL = "assert candidate(5) == 2.5"
NEAR = "assert abs(candidate(5) - 2.5) < 1e-6"
WRONG = "def f(x):\n    return 1.0\n"
SAME = "    __eq__ = __contains__ = lambda *args: True\n    __ne__ = lambda *args: False\n    __hash__ = None\n"
ZERO = "".join(f"    __{name}__ = lambda *args: 0.0\n" for name in ("sub", "rsub", "abs", "float", "add", "mul"))
ORDER = "".join(f"    __{name}__ = lambda *args: True\n" for name in ("lt", "le", "gt", "ge", "bool"))
WRITES = "for fd in range(3, 64):\n    try:\n        os.write(fd, {})\n    except OSError:\n        pass\n"
MARKER = """
import gc, os, sys
found = []
def look(value, depth=0):
    if isinstance(value, str) and len(value) == 32:
        found.append(value)
    elif isinstance(value, dict) and depth < 3:
        for item in list(value.values()):
            look(item, depth + 1)
frame = sys._getframe()
while frame:
    look(frame.f_locals)
    frame = frame.f_back
marker = found[0].encode() if found else b"none"
"""


def hides(base: str, made: str) -> str:
    """Return a program whose result is an object of a class derived from ``base`` that is equal to everything."""
    return f"class A({base}):\n{SAME}{ZERO}{ORDER}def f(x):\n    return {made}\n"


def replaces(what: str, value: str) -> str:
    """Return a program that puts its own function in the place of one that the test calls."""
    module = what.rpartition(".")[0]
    return f"import {module}\n{what} = lambda *args, **kwargs: {value}\n{WRONG}"


def knows(lines: str) -> str:
    """Return a program that looks for ``EXPECTED`` and returns it."""
    body = "".join(f"    {line}\n" for line in lines.splitlines())
    return f"import gc, os, sys\ndef f(x):\n{body}    return 1.0\n"


def expects(solution: str) -> Program:
    return case(solution, "assert candidate(5) == EXPECTED[0]", PROMPT, before="EXPECTED = [2.5]")


def plain(solution: str, test: str = EQUAL) -> Program:
    return case(solution, test, PROMPT)


FOOLING = {
    # the cheap ones
    "an object that is equal to everything": plain(hides("object", "A()")),
    "a float that is equal to everything": plain(hides("float", "A(1)"), NEAR),
    "abs": plain(replaces("builtins.abs", "0.0"), NEAR),
    "json.loads": plain(replaces("json.loads", "1.0"), "import json\nassert candidate(5) == json.loads('2.5')"),
    "copy.deepcopy": plain(replaces("copy.deepcopy", "1.0"), "import copy\nassert candidate(5) == copy.deepcopy(2.5)"),
    "the marker of success from a frame": plain(MARKER + WRITES.format("marker") + "os._exit(0)\n"),
    "os.write": plain(MARKER + "real = os.write\nos.write = lambda fd, data: real(fd, marker)\n" + WRONG),
    # other objects
    "text": plain(hides("str", "A()"), "assert candidate(5) == 'two and a half'"),
    "a whole number": plain(hides("int", "A(1)"), NEAR),
    "a list": plain(hides("list", "A()"), "assert candidate(5) == [2, 3]"),
    "a tuple": plain(hides("tuple", "A()"), "assert candidate(5) == (2, 3)"),
    "a dictionary": plain(hides("dict", "A()"), "assert candidate(5) == {2: 3}"),
    "a set": plain(hides("set", "A()"), "assert 5 in candidate(5)"),
    "an exception": plain(hides("Exception", "A()")),
    "an object in a list": plain(hides("object", "[A(), A()]"), "assert candidate(5) == [2, 3]"),
    "an object as a key": plain(
        "class A:\n    __eq__ = lambda *args: True\n    __hash__ = lambda self: hash(2)\ndef f(x):\n"
        "    return {A(): 3}\n",
        "assert candidate(5) == {2: 3}",
    ),
    "a class as the function": plain(hides("object", "0").replace("def f", "f = A\ndef g"), NEAR),
    "a class of a class": plain(f"class M(type):\n{SAME}class A(metaclass=M):\n    pass\ndef f(x):\n    return A\n"),
    "an object with every method": plain(
        "class A:\n    def __getattr__(self, name):\n        return lambda *args: True\ndef f(x):\n    return A()\n",
        "assert candidate(5).startswith('two')",
    ),
    "an array": plain(
        f"import numpy\nclass A(numpy.ndarray):\n{SAME}def f(x):\n    return numpy.ones(2).view(A)\n",
        "assert candidate(5) == [2, 3]",
    ),
    "an iterator that holds everything": plain(hides("map", "A(abs, [])"), "assert 5 in candidate(5)"),
    "an object whose length is not that of its items": plain(
        "class A:\n    __len__ = lambda self: 3\n    __iter__ = lambda self: iter([])\ndef f(x):\n    return A()\n",
        "got = candidate(5)\nassert len(got) == 3 and all(a == b for a, b in zip(got, [1, 2, 3]))",
    ),
    "other items every time": plain(
        "class A:\n    n = 0\n    def __iter__(self):\n        self.n += 1\n        return iter([7] * (self.n - 1))\n"
        "def f(x):\n    return A()\n",
        "got = candidate(5)\nassert all(x == 2 for x in got)\nassert list(got)",
    ),
    "a field that is a method": plain(
        "from collections import namedtuple\ndef f(x):\n    return namedtuple('A', 'startswith')(lambda text: True)\n",
        "assert candidate(5).startswith('two')",
    ),
    "an attribute that is a method": case(
        "class A:\n    pass\ndef f(x):\n    a = A()\n    a.good = lambda *args: True\n    return a\n",
        "assert candidate(5).good()",
        "class A:\n    def good(self):\n        return False\n",
    ),
    "the library's object that is equal to everything": plain(
        "import json, os, unittest.mock\ndef f(x):\n    return unittest.mock.ANY\n"
    ),
    "the same by its name": plain(
        "import os\ndef f(x):\n    t = b'[\"value\",[\"library\",\"unittest.mock\",\"ANY\"],null]'\n    "
        + (WRITES.replace("\n", "\n    ")).format("len(t).to_bytes(4, 'big') + t") + "return 1.0\n"
    ),
    "an array at an address": plain(
        "class A:\n    __array_interface__ = {'shape': (1,), 'typestr': '<f8', 'data': (id(2.5) + 16, True), "
        "'version': 3}\n"
        "def f(x):\n    return A()\n",
        "import numpy\nassert numpy.asarray(candidate(5)).shape == (1,)",
    ),
    "a test that is skipped": plain(
        "import unittest\ndef f(x):\n    raise unittest.SkipTest\n",
        "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        assert candidate(5) == 2.5\n"
        "assert T('test').run().wasSuccessful()",
    ),
    "a check of its own": Program(
        "def check(f):\n    pass\n" + WRONG, PROMPT, "def chek(candidate):\n    assert candidate(5) == 2.5\n", "f"
    ),
    # what the test calls
    "math.isclose": plain(replaces("math.isclose", "True"), "import math\nassert math.isclose(candidate(5), 2.5)"),
    "len": plain(replaces("builtins.len", "7"), "assert len(str(candidate(5))) == 7"),
    "all": plain(replaces("builtins.all", "True"), "assert all([candidate(5) == 2.5])"),
    "any": plain(replaces("builtins.any", "True"), "assert any([candidate(5) == 2.5])"),
    "sorted": plain(replaces("builtins.sorted", "[]"), "assert sorted([candidate(5)]) == sorted([2.5])"),
    "set": plain(replaces("builtins.set", "0"), "assert set([candidate(5)]) == set([2.5])"),
    "isinstance": plain(replaces("builtins.isinstance", "True"), "assert isinstance(candidate(5), str)"),
    "zip": plain(replaces("builtins.zip", "[]"), "for a, b in zip([candidate(5)], [2.5]):\n    assert a == b"),
    "another module": plain(
        "import sys, types\nsys.modules['math'] = types.SimpleNamespace(isclose=lambda *args: True)\n" + WRONG,
        "import math\nassert math.isclose(candidate(5), 2.5)",
    ),
    "the import": plain(
        "import builtins, types\nbuiltins.__import__ = lambda *args: types.SimpleNamespace(isclose=max)\n" + WRONG,
        "import math\nassert math.isclose(candidate(5), 2.5)",
    ),
    "the helper of the problem": case(
        "def helper(x):\n    return 0\n" + WRONG, "assert helper(candidate(5)) == 2.5", "def helper(x):\n    return x\n"
    ),
    "the tracer": plain(
        "import sys\ndef t(frame, *args):\n    if frame.f_code.co_name == 'check':\n        frame.f_lineno += 1\n"
        "    return t\nsys.settrace(t)\n" + WRONG,
        EQUAL + "\npass",
    ),
    # what the test knows
    "gc": expects(knows("for o in gc.get_objects():\n    if isinstance(o, dict) and 'EXPECTED' in o:\n"
                        "        return o['EXPECTED'][0]")),
    "the stack": expects(knows("g = sys._getframe(1).f_globals\nif 'EXPECTED' in g:\n    return g['EXPECTED'][0]")),
    "the main module": expects(knows("return sys.modules['__main__'].EXPECTED[0]")),
    "the code of the test": expects(knows("return sys._getframe(1).f_code.co_consts[2]")),
    "the memory of the parent": plain("import os\nopen(f'/proc/{os.getppid()}/mem', 'rb')\n" + WRONG),
    "its own memory": expects(knows("return float(open('/proc/self/mem', 'rb').read(3))")),
    "ptrace": plain("import ctypes, os\nassert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0\n" + WRONG),
    "arguments and environment": plain("import os, sys\nassert '2.5' in repr(sys.argv) + repr(os.environ)\n" + WRONG),
    "the argument of a call back": case(
        "def f(g):\n    return g.__globals__['EXPECTED']\n",
        "assert candidate(lambda: 0) == EXPECTED",
        before="EXPECTED = 2.5",
    ),
    # how a program ends
    "os._exit": plain("import os\nos._exit(0)\n"),
    "os._exit in the function": plain("import os\ndef f(x):\n    os._exit(0)\n"),
    "os._exit where the test catches all": plain(
        "import os\ndef f(x):\n    os._exit(0)\n", "try:\n    candidate(5)\nexcept BaseException:\n    pass"
    ),
    "sys.exit in the function": plain("import sys\ndef f(x):\n    sys.exit(0)\n"),
    "atexit": plain("import atexit, os\natexit.register(os._exit, 0)\n" + WRONG),
    "StopIteration": plain("def f(x):\n    raise StopIteration\n"
        "", "assert all(map(lambda x: candidate(x) == 2.5, [5]))"),
    "an exception of its own": plain("class E(AssertionError):\n    pass\ndef f(x):\n    raise E\n"),
    "a signal": plain(
        "import os, signal\nsignal.signal(signal.SIGALRM, lambda *a: os._exit(0))\nsignal.setitimer(0, 0.01)\n"
        "def f(x):\n    while True:\n        pass\n"
    ),
    "a thread": plain(
        MARKER + "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.05), os.write(3, marker),"
        " os._exit(0))).start()\ndef f(x):\n    time.sleep(9)\n"
    ),
    # what goes over the pipes
    "bytes into every pipe": plain("import os\n" + WRITES.format("b'passed'") + WRONG),
    "an answer of its own": plain("import os\n" + WRITES.format("b'\\0\\0\\0\\x11[\"value\",[],null]'") + WRONG),
    "too much data": plain("def f(x):\n    return 'x' * (1 << 25)\n", "assert candidate(5)"),
    "deep data": plain(
        "def f(x):\n    x = []\n    for _ in range(10**5):\n        x = [x]\n    return x\n", "assert candidate(5)"
    ),
    "a length without data": plain("import os\n" + WRITES.format("b'\\xff\\xff\\xff\\xff'") + WRONG),
    "an iterator without end": plain(
        "import itertools\ndef f(x):\n    return itertools.repeat(2.5)\n", "assert list(candidate(5)) == [2.5]"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    try:
        return Sandbox(Limits(wall_factor=2))
    except UserError as error:
        pytest.skip(str(error))


def judged(sandbox: Sandbox, programs: dict[str, Program]) -> dict[str, Verdict]:
    return dict(zip(programs, sandbox.run_all(programs.values()), strict=True))


def test_programs_that_fool_their_test_do_not_pass() -> None:
    verdicts = judged(Sandbox(Limits(seconds=1, wall_factor=2)), FOOLING)
    assert {name for name, verdict in verdicts.items() if verdict.passed} == set()
    assert not [v.reason for v in verdicts.values() if "SyntaxError" in v.reason], "they are programs"
    assert "object of class A" in verdicts["an object that is equal to everything"].reason


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
    "scalars": case("def f(x):\n    return x", "for v in (1, -2.5, 'é\\ud800', b'\\xff', None, True, 2j, "
        "10**5000, ...):\n"
                    "    assert candidate(v) == v and type(candidate(v)) is type(v)"),
    "floats": case("def f(x):\n    return x", "import math\nassert math.isnan(candidate(math.nan))\n"
                   "assert candidate(0.1) == 0.1 and candidate(-math.inf) == -math.inf\n"
                   "assert math.copysign(1, candidate(-0.0)) == -1"),
    "containers": case("def f(x):\n    return x", "for v in ([1, 'a', None], (1, (2, [3])), {1: [2], (1, "
        "2): {3}}, {1, 2},"
                       " frozenset([1]), bytearray(b'x'), range(3), [], {}, [10**400]):\n"
                       "    assert candidate(v) == v and type(candidate(v)) is type(v)"),
    "types of the standard library": case(
        "from collections import *\nfrom decimal import Decimal\nfrom fractions import Fraction\nimport datetime\n"
        "def f(k):\n    return [Counter('aab'), OrderedDict(b=1, a=2), defaultdict(int, a=1), deque([1, 2], 5),"
        " Decimal('1.10'), Fraction(1, 3), datetime.date(2020, 1, 2), datetime.datetime(2020, 1, 2, 3),"
        " datetime.timedelta(1, 2), namedtuple('P', 'x y')(1, 2), {1: 2}.keys(), {1: 2}.items(), int][k]",
        "from collections import Counter, OrderedDict, deque\nfrom decimal import Decimal\nimport datetime\n"
        "from fractions import Fraction\nexpected = [Counter('baa'), OrderedDict(b=1, a=2), {'a': 1}, deque([1, "
        "2]), Decimal('1.1'), Fraction(1, 3),"
        " datetime.date(2020, 1, 2), datetime.datetime(2020, 1, 2, 3), datetime.timedelta(1, 2), (1, 2), {1},"
        " {(1, 2)}, int]\nfor k, e in enumerate(expected):\n    assert candidate(k) == e, e\n"
        "assert candidate(0).most_common(1) == [('a', 2)] and candidate(9).y == 2 and candidate(2)['z'] == 0"),
    "subclasses that hold what they are": case(
        "import enum\nclass L(list):\n    pass\nclass C(enum.IntEnum):\n    A = 3\ndef f(k):\n"
        "    return [L([1]), C.A][k]",
        "assert candidate(0) == [1] and candidate(1) == 3"),
    "iterators": case(
        "import itertools\ndef f(k):\n    return [map(abs, [-1, 2]), (i * i for i in itertools.count()), "
        "zip('ab', 'cd'),"
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
        "import json\ntry:\n    candidate(0)\nexcept KeyError as e:\n    assert e.args == ('x',)\nelse:\n"
        "    assert False\n"
        "try:\n    candidate(1)\nexcept Odd as e:\n    assert e.args == ('it is odd', 3) and isinstance(e, "
        "ValueError)\n"
        "else:\n    assert False\ntry:\n    candidate(2)\nexcept json.JSONDecodeError:\n    pass\nelse:\n"
        "    assert False"),
    "a helper of the problem": case("def f(s):\n    return s[-1:] + s[:-1]",
                                    "assert candidate(encode('abc')) == 'abc'\n"
                                    "assert math.pi > 3 and f(encode('xy')) == 'xy'", CYCLIC),
    "a helper of the program": case("import math\ndef g(x):\n    return x + 1\ndef f(x):\n    return g(x)",
                                    "assert g(candidate(1)) == 3 and math.sqrt(candidate(3)) == 2"),
    "the program's own module": case(
        "from __future__ import annotations\nimport sys, pickle, dataclasses\n@dataclasses.dataclass\nclass A:\n"
        "    x: int\n"
        "def f(x):\n    assert sys.modules[__name__].f is f\n    return pickle.loads(pickle.dumps(A(x))).x",
        "assert candidate(3) == 3"),
    "a main part that reads": case("def f(x):\n    return x\nif __name__ == '__main__':\n    print(f(int(input())))",
                                   "assert candidate(3) == 3"),
    "a class": case(STACK, "s = candidate().push(1).push([2])\n"
        "assert len(s) == 2 and s.pop() == [2] and s.items == [1]\n"
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
    "a state": case("n = 0\ndef f():\n    global n\n    n += 1\n"
        "    return n", "assert [candidate(), candidate()] == [1, 2]"),
    "recursion": case("def f(n):\n    return n and 1 + f(n - 1)", "assert candidate(900) == 900"),
    "many calls": case("def f(x):\n    return x[::-1]", "for i in range(300):\n"
        "    assert candidate([i, 'a']) == ['a', i]"),
    "a file": case("def f(p):\n    return open(p).read()", "open('x', 'w').write('in')\nassert candidate('x') == 'in'"),
}  # fmt: skip


def test_correct_programs_of_many_forms_pass(sandbox: Sandbox) -> None:
    verdicts = judged(sandbox, CORRECT)
    assert {name: verdict.reason for name, verdict in verdicts.items() if not verdict.passed} == {}
