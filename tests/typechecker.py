"""The run-time type checker of the typing hook: beartype, for which a whole number is a float too.

PEP 484 says so, and `budget=2` is what people write; beartype by default does not follow it.
"""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
