"""The study in one command; what was finished before is not done again.

python -m studies.better_answer.run --data ../shared/data --output runs/better-answer
python -m studies.better_answer.run --data ../shared/data --output runs/quick --quick
python -m studies.better_answer.run --report    the README's tables, from results.json
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from studies.better_answer.main import main

    main()
