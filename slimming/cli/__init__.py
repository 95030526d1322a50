"""Command lines: the only room that knows argparse.

- `entry.run`: run a main; errors become one line and an exit status
- `flags.make_parser`, `flags.parse`: flags from the fields of a settings class
"""
