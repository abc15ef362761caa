"""``import rasa_train.peft`` adds RaSA and MoRA to the PEFT library (``integrations.peft_plugin``).

``python -m rasa_train.peft MODULE ARGUMENTS`` adds them and then runs MODULE as ``python -m MODULE ARGUMENTS`` would.
"""

from .integrations.peft_plugin import MoraConfig as MoraConfig
from .integrations.peft_plugin import MoraModel as MoraModel
from .integrations.peft_plugin import RasaConfig as RasaConfig
from .integrations.peft_plugin import RasaModel as RasaModel

if __name__ == "__main__":
    import runpy
    import sys

    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
