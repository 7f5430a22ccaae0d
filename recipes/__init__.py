"""Recipes that ship with the package: `coupled train quickstart` finds them by name."""

if __name__ != "coupled.recipes":
    raise ImportError("import coupled.recipes, not recipes: the folder is a package of the distribution 'coupled'")
