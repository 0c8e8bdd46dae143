"""The command line: one file a command, no mathematics. Importing it imports no torch."""
