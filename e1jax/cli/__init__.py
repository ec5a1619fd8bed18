"""What all commands share: how they run, stop and print, their flags and their files."""
