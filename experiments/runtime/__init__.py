"""How jobs run: configs, workdirs, files, devices; nothing about learning."""
