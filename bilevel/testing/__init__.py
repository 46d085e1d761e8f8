"""For authors of methods: problems with known answers, and checks of a method of one's own."""
