"""What a run is: typed, flat settings from files and flags; never imports torch."""
