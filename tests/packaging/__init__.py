"""The files that install, build and check the product."""
