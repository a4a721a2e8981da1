"""Makes every password of the stack, once."""
