"""What is done with a trained model: it is talked to, evaluated, merged, published."""
