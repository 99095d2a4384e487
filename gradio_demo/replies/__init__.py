"""What tabs with a model's words in them share: replies and measurements that are followed, stopped and described."""
