"""YAML recipes, validated as a whole before anything is loaded."""
