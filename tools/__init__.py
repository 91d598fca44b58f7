"""Programs for those who work on Sluice. No part of it is installed."""
