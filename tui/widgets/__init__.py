"""What is on the screen: each widget shows what it is told and posts what the user did."""
