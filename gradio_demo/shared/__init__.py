"""What every part of the page needs: events, small pictures, dropped texts, who is asking and who may decide."""
