"""What is measured and compared on a host with Ascend NPUs before it is trusted."""
