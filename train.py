"""Train a recipe: composer -n 8 train.py yamls/deit_s.yaml [key=value ...]"""

import sys

from vitcomposer.train import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], report_errors=True))
