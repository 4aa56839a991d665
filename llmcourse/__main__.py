"""`python -m llmcourse` is the command `llmcourse`."""

from llmcourse.cli import main

if __name__ == "__main__":
    main()
