"""The command line: a file a command, `app.py` their list.

In: paths of records, a script to run. Out: tables, figures and pages. May import everything; nothing imports it.
What is shown has gone through `shown`: it can neither move the cursor nor be taken for markup.
"""
