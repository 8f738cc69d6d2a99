"""What training costs: operations, time, memory."""
