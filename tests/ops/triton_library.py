"""Triton's own functions in its interpreter, whatever was imported before.

Import this before anything of `moefold.ops.triton`. What Triton defines in its own language, tl.sum
and its kin, runs where it was meant to run when Triton was imported; importing torch._dynamo is
enough for that, and some test does it before the variable of the interpreter is set.
"""

from tests.ops.triton_interpreter import DEVICE, interpreted  # isort: skip - sets the variable

import triton.language as tl

if interpreted:
    from triton.runtime.interpreter import InterpretedFunction

    for _name, _function in list(vars(tl.standard).items()):
        if type(_function).__name__ == "JITFunction":
            _made = InterpretedFunction(_function.fn)
            for _module in (tl.standard, tl):
                if getattr(_module, _name, None) is _function:
                    setattr(_module, _name, _made)

__all__ = ["DEVICE"]
