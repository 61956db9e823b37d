"""A page in the browser on which a model is tried with all image tokens and with few.

`asked`, `groups`, `videos`, `turns` and `results` compute what is shown, `html` and `plots` write it, and none of them
knows Gradio; `page` lays it out, `server` serves it.
"""
