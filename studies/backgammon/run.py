"""The study in one command; what was finished before is not done again.

python studies/backgammon/run.py --data ../shared/data --output runs/backgammon
python studies/backgammon/run.py --data ../shared/data --output runs/quick --quick
python studies/backgammon/run.py --report    the README's tables, from results.json
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from studies.backgammon.main import main

    main()
