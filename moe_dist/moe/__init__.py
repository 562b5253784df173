"""The mixture-of-experts layer, on one device, readable as the equation. Nothing here knows of other processes."""
