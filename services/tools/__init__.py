"""What an owner does with models beside serving them: quantise, compare, profile. Stands above the programs it uses."""
