"""One model on several ranks: a part of every layer on each, and a rank that leads the others."""
