"""A live server over HTTP: requests and answers in OpenAI's shape, the thread that steps the
engine, the application, and a page to try it (page.html).

Only `metrics` and `app` need the extra `serve`, so nothing is re-exported here.
"""
