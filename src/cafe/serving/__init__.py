"""HTTP over one copy of the weights: embeddings, chat, and a page to search and ask a collection.

A request, from the network to the model:

    server           load, listen, and finish what was taken
    app, routes      what is answered, and where
    security         who may ask, and how much
    schemas          what requests and answers hold
    contents         texts and images of a request
    image_workers    processes that decode and process images
    encoding         contents -> jobs

A collection, if there is one:

    search_schemas   what requests and answers about it hold
    gallery          its images by opaque ids, without their paths
    place_images     where an image is -> the image, in a worker
    thumbnails       small JPEG files of images
    questions        a question about images -> a streamed answer
    page             what a browser shows

The model, which one thread runs:

    jobs             one unit of work, with its future
    engine           the thread: reads waiting jobs, then decodes a token of every chat
    scheduler        which jobs are read next
    model_runner     one forward pass for many jobs
    chats            running chats, and their caches
    sampling         the next token
    answer_text      tokens -> pieces of text
    prefixes, lru    what is kept of images, by content
    served_model     a `Cafe` for other threads

Around both:

    config           what is allowed
    metrics          what is measured
"""
