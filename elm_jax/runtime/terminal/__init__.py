"""What people and scripts see: tables as text, progress lines; nothing in a name acts on a terminal."""
