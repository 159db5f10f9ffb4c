"""Conversations: messages, chat templates, and which tokens an assistant has said."""
