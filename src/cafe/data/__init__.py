"""Files -> Examples: public formats, a fixed order, and the quarantine of bad records."""
