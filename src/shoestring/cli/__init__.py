"""The command line: `main`, and one module a command, imported when that command is called."""
