"""What the tabs that run the model share: replies and measurements that are followed, stopped and described."""
