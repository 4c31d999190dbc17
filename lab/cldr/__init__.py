"""Questions in many languages from Unicode CLDR."""
