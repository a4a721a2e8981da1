"""What fits on a card, how fast it will be and what it costs: pure functions of a model's config.json and a card.

`shape.py` reads the model, `cards.py` knows the cards, `memory.py` deals out the card's memory as vLLM does,
`training.py` says what a LoRA run needs, `speed.py` is a roofline, `price.py` is arithmetic on a table of prices.
What they cannot know they refuse with CannotSay, which names what is missing.
"""
