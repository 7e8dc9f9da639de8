def forward_packed(decoder, embeds, layout, *, position_ids=None, backend="auto"):
    return decoder(inputs_embeds=embeds, attention_mask=layout.mask(embeds.device), position_ids=position_ids, use_cache=False).last_hidden_state
