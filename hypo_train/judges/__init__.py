"""Which of two responses is better: pairwise judges behind one protocol, and the win-rate they give."""
