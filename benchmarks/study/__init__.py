"""Rooms of the learning study: arms (what is compared), grid (which cells), cell (one run), report (what follows)."""
