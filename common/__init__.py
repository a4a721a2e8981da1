"""What more than one program uses. Imports itself only; `make check` sees to it."""
