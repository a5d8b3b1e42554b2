"""The files of the finished consumers: schemas for editors, examples, and what is said of mistakes in them."""
