"""World, plan, engine and memory estimates."""
