"""Everything a person runs: the `moe-dist` command, local and Ray launching, serving."""
