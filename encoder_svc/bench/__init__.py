"""``encoder-svc bench serve``: load on a running server, and what came of it.

::

    arguments.py   the command's flags, and the frozen options that they make
    mix.py         which requests are sent, and how often: a file, or the default
    pictures.py    the images, made before the run; each copy sent can be made unique
    load.py        closed loop (N clients) and open loop (Poisson arrivals)
    recorder.py    counts, sums and bounded samples of what came back
    samples.py     percentiles
    report.py      the recorder's figures as one object: JSON
    table.py       … and as text
    plot.py        … and as a picture
    serve.py       the command: all of these, top to bottom

What is counted. The window is the ``--duration`` seconds that follow the warm-up.

- Requests, latencies and errors are those of requests *due* in the window, whenever they ended: leaving out what
  was still running at its end would leave out the slowest.
- Rates (images/s, patches/s, …), stages and goodput are of what *arrived* in the window, divided by its length:
  neither the ramp at the start nor the last requests' tail counts. Answers come in lumps, a batch at a time: a
  window of fewer than some twenty batches knows its rates only to within a batch at each end.
- Latency runs from the moment a request was due. In open loop that is its arrival in the schedule, so that a load
  generator that falls behind cannot hide a wait (``send_lag_s`` says by how much it did).
- Latency and time to first embedding are those of requests whose images all succeeded; the others have a
  latency of their own (``failure_latency_s``), so that quick refusals do not flatter.
"""
