"""The study in one command; what was finished before is not done again.

python studies/language_model/run.py --data ../shared/data --output runs/language-model
python studies/language_model/run.py --data ../shared/data --output runs/quick --quick
python studies/language_model/run.py --report    the README's tables, from results.json
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from studies.language_model.main import main

    main()
