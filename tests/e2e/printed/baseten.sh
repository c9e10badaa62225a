 curl -X POST https://app.baseten.co/models/{MODEL_VERSION_ID}/predict \
  -H 'Authorization: Api-Key {YOUR_API_KEY}' \
  -d '[
    {
        "prompt": "If I was a billionaire, I would",
        "max_length": 50
    }
]'
