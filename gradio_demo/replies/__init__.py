"""What several tabs share: work that is followed and stopped, settings of replies, small pictures."""
