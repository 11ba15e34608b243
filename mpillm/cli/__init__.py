"""One file a command; `mpillm.__main__` loads the one that is called."""
