"""The console: web pages that do what the command does, for a stack on this machine or on AWS.

It has no state of its own. `server` listens on 127.0.0.1, `app` has the routes and admits only requests with the address's
secret, `preview` validates a dataset before it is dropped, `live` follows a run, `pages` renders HTML.
"""
