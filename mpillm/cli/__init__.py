"""The commands, one file each: ``mpillm.cli.NAME.command`` is what ``mpillm NAME`` runs."""
