"""What is sent: strategies for hypothesis."""
