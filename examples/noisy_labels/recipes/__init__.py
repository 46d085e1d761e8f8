"""The methods: what each one trains, on which samples, and how it moves."""
